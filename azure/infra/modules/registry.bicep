// The images that jobs and endpoints run in. Private endpoints need the dearer tier.
param name string
param location string
param tags object

@description('Whether there is a way in from the internet.')
@allowed([
  'Enabled'
  'Disabled'
])
param publicAccess string
param logsId string

resource registry 'Microsoft.ContainerRegistry/registries@2023-07-01' = {
  // checkov:skip=CKV_AZURE_139: open to identities from anywhere unless privateNetwork closes it
  // checkov:skip=CKV_AZURE_163: scanning of images is Defender's, a plan of the whole subscription
  // checkov:skip=CKV_AZURE_164: signed images are the deprecated content trust; the workflow deploys by digest
  // checkov:skip=CKV_AZURE_165: one region is enough to train in
  // checkov:skip=CKV_AZURE_166: quarantine needs a scanner that lets images go
  // checkov:skip=CKV_AZURE_167: retention of untagged images needs the Premium tier; the README says how to clear up
  // checkov:skip=CKV_AZURE_233: zone redundancy needs the Premium tier
  // checkov:skip=CKV_AZURE_237: dedicated data endpoints need the Premium tier
  name: name
  location: location
  tags: tags
  sku: {
    name: publicAccess == 'Disabled' ? 'Premium' : 'Standard'
  }
  properties: {
    adminUserEnabled: false
    anonymousPullEnabled: false
    publicNetworkAccess: publicAccess
    networkRuleBypassOptions: 'AzureServices'
  }
}

resource audit 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: registry
  name: 'to-logs'
  properties: {
    workspaceId: logsId
    logs: [
      {
        category: 'ContainerRegistryLoginEvents'
        enabled: true
      }
    ]
  }
}

output id string = registry.id
output name string = registry.name
output server string = registry.properties.loginServer
