// The Azure ML workspace, in a managed network: nodes and endpoints have no public address and still reach PyPI.
param name string
param location string
param tags object

@description('Whether there is a way in from the internet.')
@allowed([
  'Enabled'
  'Disabled'
])
param publicAccess string
param identityId string
param storageId string
param vaultId string
param registryId string
param insightsId string
param logsId string

resource workspace 'Microsoft.MachineLearningServices/workspaces@2024-10-01' = {
  // checkov:skip=CKV_AZURE_243: privateNetwork makes the endpoint, in network.bicep
  name: name
  location: location
  tags: tags
  sku: {
    name: 'Basic'
    tier: 'Basic'
  }
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: {
      '${identityId}': {}
    }
  }
  properties: {
    friendlyName: name
    description: 'Jobs and endpoints of llmkit'
    primaryUserAssignedIdentity: identityId
    storageAccount: storageId
    keyVault: vaultId
    containerRegistry: registryId
    applicationInsights: insightsId
    systemDatastoresAuthMode: 'identity'
    publicNetworkAccess: publicAccess
    // A registry that nobody outside can reach has no builder: the cluster builds the images of environments.
    imageBuildCompute: publicAccess == 'Disabled' ? 'cpu' : null
    v1LegacyMode: false
    managedNetwork: {
      isolationMode: 'AllowInternetOutbound'
    }
  }
}

resource audit 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: workspace
  name: 'to-logs'
  properties: {
    workspaceId: logsId
    logs: [
      {
        category: 'AmlComputeClusterEvent'
        enabled: true
      }
      {
        category: 'AmlRunStatusChangedEvent'
        enabled: true
      }
    ]
  }
}

output id string = workspace.id
output name string = workspace.name
